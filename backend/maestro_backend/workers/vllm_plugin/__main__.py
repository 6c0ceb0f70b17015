"""`python -m maestro_backend.workers.vllm_plugin MODULE [ARG...]`: run MODULE inside a worker."""

import runpy
import sys

from maestro_backend.workers.vllm_plugin import join

if __name__ == "__main__":
    join()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
