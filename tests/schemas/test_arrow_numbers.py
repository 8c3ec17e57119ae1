"""Arrow columns as numpy arrays, and Arrow without the libraries that it would import."""

import subprocess
import sys

SCRIPT = """
import sys
import numpy as np
import pyarrow as pa
from headrace.schemas.shards.arrow_numbers import leave_pandas_out
leave_pandas_out()
assert pa.array(np.arange(3)).to_pylist() == [0, 1, 2]
assert "pandas" not in sys.modules
import pandas
assert pandas.DataFrame({"a": [1]}).shape == (1, 1)
"""


def test_arrow_can_be_kept_from_importing_pandas_which_others_still_can():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)
