"""Imported first by every job: puts the repository's root and `platform/` on the path of the driver.

`ray job submit --working-dir .` puts the root on the path of the workers and `python jobs/x.py` puts `jobs/` on the
driver's, so neither finds `ray_platform`. `ray_platform.connect` does the same for the workers.
"""

import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
for _folder in (str(_ROOT / "platform"), str(_ROOT)):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # a bar a loaded file is no news
