"""The zip for `spark-submit --py-files`: python -m headrace.jobs.tools.spark_zip headrace.zip"""

import sys
import zipfile
from pathlib import Path

import headrace.dataprep
import headrace.jobs
import headrace.schemas


def write_zip(target: Path) -> None:
    """Zip what executors need. Without entries for folders, `headrace` is not found in a zip."""
    packages = (headrace.dataprep, headrace.jobs, headrace.schemas)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("headrace")
        for package in packages:
            root = Path(package.__path__[0])
            name = Path(*package.__name__.split("."))
            for path in [root, *sorted(root.rglob("*"))]:
                if "__pycache__" not in path.parts:
                    archive.write(path, name / path.relative_to(root))


if __name__ == "__main__":
    write_zip(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: written")
