"""What the paper's experiments would take: cells, jobs, memory, hours. Runs none; needs the checkout."""

import subprocess
import sys
from pathlib import Path

experiments = Path(__file__).resolve().parents[2] / "experiments"
subprocess.run([sys.executable, "paper.py", "--preset", "small", "--dry-run"], cwd=experiments, check=True)
