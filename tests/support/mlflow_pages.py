"""What a reader sees of a run on MLflow's pages, as a browser shows them."""

from pathlib import Path
from typing import Any

from mlflow import MlflowClient

LINES = ".js-plotly-plot .scatterlayer path.js-line"  # of charts that have points


class Pages:
    """Of one run. Each method opens a page, waits until what it is about is there, and returns what it shows."""

    def __init__(self, page: Any, server: str, uri: str, run_id: str, pictures: Path | None = None) -> None:
        """`page`: Playwright's; `pictures`: a folder for a screenshot of each page."""
        self.page, self.pictures = page, pictures
        client = MlflowClient(uri)
        self.run = client.get_run(run_id)
        versions = client.search_model_versions(f"run_id='{run_id}'")
        self.version = max(versions, key=lambda version: int(version.version))
        self.experiment = f"{server}/#/experiments/{self.run.info.experiment_id}"
        self.errors: list[str] = []
        self.server = server
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("response", lambda answer: self._note(answer))
        # Debian has none of the fonts that the pages ask for but the one of emoji, and takes digits and blanks from it.
        style = '*:not(i):not(.fa) { font-family: "DejaVu Sans", sans-serif !important }'
        page.add_init_script(
            f"addEventListener('DOMContentLoaded', () => document.head.append(Object.assign("
            f"document.createElement('style'), {{textContent: {style!r}}})))"
        )

    def overview(self) -> str:
        """The text of the run's first page."""
        self._open(f"{self.experiment}/runs/{self.run.info.run_id}")
        for part in ("Datasets", "Registered models", "Pretraining by the recipe"):
            self.page.get_by_text(part).first.wait_for()
        return self._shot("mlflow_run")

    def curves(self) -> tuple[str, int]:
        """(the text of the page of metrics, how many lines are drawn on it)."""
        self._open(f"{self.experiment}/runs/{self.run.info.run_id}/model-metrics")
        self.page.get_by_placeholder("Search metric charts").fill("train/loss")  # charts are drawn where they are in view
        self.page.locator(LINES).nth(2).wait_for(state="attached")
        return self._shot("mlflow_curves"), self.page.locator(LINES).count()

    def machines(self) -> str:
        """The text of the page of system metrics."""
        self._open(f"{self.experiment}/runs/{self.run.info.run_id}/system-metrics")
        self.page.locator(LINES).first.wait_for(state="attached")
        return self._shot("mlflow_machines")

    def grid(self, path: str) -> int:
        """The width in pixels of the picture that is the artifact `path`, as it was loaded."""
        self._open(f"{self.experiment}/runs/{self.run.info.run_id}/artifacts/{path}")
        picture = self.page.locator("img[src^='blob:'], .image-outer-container img").first
        picture.wait_for()
        self._shot("mlflow_grid")
        return int(picture.evaluate("picture => picture.naturalWidth"))

    def model(self) -> str:
        """The text of the registered model's version."""
        self._open(f"{self.server}/#/models/{self.version.name}/versions/{self.version.version}")
        self.page.get_by_text("Inputs (").first.click()
        self.page.get_by_text("caption").first.wait_for()
        return self._shot("mlflow_model")

    def _open(self, url: str) -> None:
        self.page.goto("about:blank")  # a change after the # alone would load nothing
        self.page.goto(url)

    def _shot(self, name: str) -> str:
        assistant = self.page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
        if assistant.count():
            assistant.first.click()
            assistant.first.wait_for(state="detached")
        if self.pictures:
            self.page.wait_for_timeout(2000)  # what moves comes to rest
            self.page.screenshot(path=self.pictures / f"{name}.png")
        return self.page.locator("body").inner_text()

    def _note(self, answer: Any) -> None:
        if answer.status >= 500:
            self.errors.append(f"{answer.status} of {answer.url}")
