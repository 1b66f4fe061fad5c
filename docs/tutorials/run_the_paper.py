"""What the paper's experiments would take: cells, jobs, memory, hours. Runs none; start in the checkout."""

import subprocess
import sys
from pathlib import Path

here = Path.cwd()  # the checkout, or a folder in it
root = next(path for path in (here, *here.parents) if (path / "experiments" / "paper.py").is_file())

command = [sys.executable, "paper.py", "--preset", "small", "--dry-run"]
print(subprocess.run(command, cwd=root / "experiments", check=True, capture_output=True, text=True).stdout)
