"""The content of MLflow's pages for a run, as shown in a browser; `python -m tests.support.mlflow_pages RUN FOLDER` takes
screenshots of them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from ray_platform.tracking import read_run_record
from ray_platform.tracking.mlflow_tracker import run_page
from tests.support.html_page import browser_page
from tests.support.mlflow_server import MlflowServer

TRAINING_VIEW = "workflowType=machine_learning"  # as in the address that a training prints
LINES = ".js-plotly-plot .scatterlayer path.js-line"  # lines of charts that have points


class Pages:
    """The pages of one run. Each method opens a page, waits until its content has loaded, and returns that content."""

    def __init__(self, page: Any, server: str, uri: str, run_id: str) -> None:
        """Open the run's pages in a Playwright `page`."""
        self.page, self.server = page, server
        client = MlflowClient(uri)
        self.curves_page = run_page({"tracking_uri": server, "experiment": "", "run_id": run_id})
        self.version = max(client.search_model_versions(f"run_id='{run_id}'"), key=lambda version: int(version.version))
        self.run = f"{server}/#/experiments/{client.get_run(run_id).info.experiment_id}/runs/{run_id}"
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("response", self._note_failure)

    def overview(self) -> str:
        """Return the text of the run's overview page."""
        self._open(f"{self.run}?{TRAINING_VIEW}")
        for part in ("Datasets", "Registered models", "Pretraining by the recipe"):
            self.page.get_by_text(part).first.wait_for()
        return self._text()

    def curves(self) -> tuple[str, int]:
        """Return (text of the metrics page, number of lines in the charts that are in view)."""
        self._open(self.curves_page)
        self.page.locator(LINES).nth(2).wait_for(state="attached")
        return self._text(), self.page.locator(LINES).count()

    def slider(self) -> tuple[int, float]:
        """Show the preview images of the last step, below the curves. Return that step and the height in view, in pixels.

        Before, the run's parameters are hidden, which MLflow writes above the images: docs/tracking.md says how.
        """
        self._open(self.curves_page)
        self._text()
        self.page.get_by_placeholder("Search metric charts").fill("_overview/previews")
        slider = self.page.locator("[role=slider]").first
        slider.wait_for()
        self.page.locator("[data-component-id$='chartcard.common.tsx_158']").first.click()
        self.page.get_by_text("Configure", exact=True).click()
        self.page.get_by_text("Show run parameters").click()
        self.page.get_by_role("button", name="Save changes").click()
        last = int(slider.get_attribute("aria-valuemax") or 0)
        while slider.get_attribute("aria-valuenow") != str(last):
            slider.press("ArrowRight")
        image = self.page.locator(f"img[src*='previews%2Bstep%2B{last}']").first
        image.wait_for()
        box = image.bounding_box() or {"y": 0.0, "height": 0.0}
        return last, min(box["height"], self.page.viewport_size["height"] - box["y"])

    def machines(self) -> str:
        """Return the text of the system metrics page, scrolled to the curves of the first node."""
        self._open(f"{self.run}/system-metrics?{TRAINING_VIEW}")
        self.page.locator(LINES).first.wait_for(state="attached")
        text = self._text()
        self.page.get_by_text("system/node_0").first.evaluate("heading => heading.scrollIntoView()")
        return text

    def grid(self, path: str) -> int:
        """Return the width in pixels of the loaded image artifact `path`."""
        self._open(f"{self.run}/artifacts/{path}")
        image = self.page.locator("img[src^='blob:'], .image-outer-container img").first
        image.wait_for()
        return int(image.evaluate("image => image.naturalWidth"))

    def model(self) -> str:
        """Return the text of the page of the registered model version."""
        self._open(f"{self.server}/#/models/{self.version.name}/versions/{self.version.version}?{TRAINING_VIEW}")
        self.page.get_by_text("Inputs (").first.click()
        self.page.get_by_text("caption").first.wait_for()
        return self._text()

    def _open(self, url: str) -> None:
        self.page.goto("about:blank")  # changing only the part after # would not reload the page
        self.page.goto(url)

    def _text(self) -> str:
        assistant = self.page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
        if assistant.count():
            assistant.first.click()
            assistant.first.wait_for(state="detached")
        return self.page.locator("body").inner_text()

    def _note_failure(self, response: Any) -> None:
        if response.status >= 500:
            self.errors.append(f"{response.status} of {response.url}")


def take_screenshots(output_dir: str, folder: Path) -> None:
    """Write the screenshots of docs/tracking.md, of the run in an output folder with its own MLflow store."""
    record = read_run_record(output_dir)
    assert record is not None
    with MlflowServer(folder, record["tracking_uri"]) as server, browser_page() as page:
        pages = Pages(page, server.url, record["tracking_uri"], record["run_id"])
        shown: dict[str, Callable[[], object]] = {
            "run": pages.overview,
            "curves": pages.curves,
            "slider": pages.slider,
            "machines": pages.machines,
            "model": pages.model,
        }
        for name, show in shown.items():
            show()
            page.wait_for_timeout(3000)  # charts and images appear one after another
            page.screenshot(path=folder / f"mlflow_{name}.png")


if __name__ == "__main__":
    take_screenshots(sys.argv[1], Path(sys.argv[2]))
