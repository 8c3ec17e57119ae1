"""`headrace prepare` on a cluster.

spark-submit --py-files headrace.zip jobs/tools/spark_prepare.py CONFIG.toml [--set KEY=VALUE]
"""

import sys

from headrace.jobs.cli import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:], "--engine", "spark"])
