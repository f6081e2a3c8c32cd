"""Print the N-th command of a README: the N-th fenced `bash` block under `## Quick start`, exactly as printed."""

import re
import sys
from pathlib import Path

readme, number = Path(sys.argv[1]).read_text(encoding="utf-8"), int(sys.argv[2])
section = re.split(r"^## ", readme, flags=re.MULTILINE)
(quick,) = [part for part in section if part.startswith("Quick start")]
blocks = re.findall(r"^```bash\n(.*?)^```", quick, flags=re.MULTILINE | re.DOTALL)
command = blocks[number - 1].strip()
assert len(command.splitlines()) == 1, f"command {number} is not one line:\n{command}"
sys.stdout.write(command + "\n")
