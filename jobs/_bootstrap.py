"""Imported first by every script in this folder: puts the root of the checkout and `platform/` on the path.

`python jobs/x.py` puts only `jobs/` on the path of the driver; `ray_platform.connect` sets the path of the workers.
"""

import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
for _folder in (str(_ROOT / "platform"), str(_ROOT)):
    if _folder not in sys.path:
        sys.path.insert(0, _folder)

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # one bar per loaded file clutters the log
