"""A page in headless Chromium: what a script finds in it."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HARNESS = """<!doctype html><body style="margin:0">
<iframe id="frame" src="%s" style="border:0; width:%dpx; height:900px"></iframe><pre id="result"></pre>
<script>
const frame = document.getElementById("frame");
const wait = ms => new Promise(done => setTimeout(done, ms));
frame.addEventListener("load", async () => {
  let result;
  try { result = await (async (win, doc) => { %s })(frame.contentWindow, frame.contentDocument); }
  catch (error) { result = {error: String(error)}; }
  document.getElementById("result").textContent = JSON.stringify(result);
});
</script>"""


def need_chromium() -> str:
    """Its command; the test is skipped where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return found


def look(page: Path, script: str, *, width: int, theme: str) -> Any:
    """What `script` returns, which knows the page as `win` and `doc`; nothing may have come to the console.

    Args:
        page: a file; a harness and a profile are written beside it.
        script: the body of an async function.
        width: of the page, in pixels.
        theme: "light" or "dark".
    """
    chromium, folder = need_chromium(), page.parent
    (folder / "harness.html").write_text(HARNESS % (page.name, width, script), encoding="utf-8")
    result = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom",
            f"--blink-settings=preferredColorScheme={int(theme == 'light')}", f"--user-data-dir={folder / 'profile'}",
            "--virtual-time-budget=15000", "--window-size=1300,1000", "--enable-logging=stderr",
            f"file://{folder / 'harness.html'}",
        ],
        capture_output=True, text=True, timeout=100, check=False, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip
    text = re.search(r'<pre id="result">(.*?)</pre>', result.stdout)
    assert text is not None
    found = json.loads(text[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert "error" not in found, found
    assert [line for line in result.stderr.splitlines() if "CONSOLE" in line] == []
    return found
