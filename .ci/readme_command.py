"""Print the commands of a README: those of its N-th fenced `bash` block under `## Quick start`, exactly as printed."""

import re
import sys
from pathlib import Path

readme, number = Path(sys.argv[1]).read_text(encoding="utf-8"), int(sys.argv[2])
section = re.split(r"^## ", readme, flags=re.MULTILINE)
(quick,) = [part for part in section if part.startswith("Quick start")]
blocks = re.findall(r"^```bash\n(.*?)^```", quick, flags=re.MULTILINE | re.DOTALL)
sys.stdout.write(blocks[number - 1])
