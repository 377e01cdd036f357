"""Messages of a job."""

from __future__ import annotations

from repshift_cli.utils.progress import Progress

UNCHECKED = (
    "NOT CHECKED: there are no images. Similar tokens are merged; whether the predictions of this model stay was not "
    "measured. Give images of the model's own kind: calibration=FOLDER or a tensor"
)
"""The warning of the Python API for a model that is merged without images."""


def not_calibrated(why: str, advice: str) -> str:
    """The warning that open fields of a metric get the values of the paper."""
    return (
        f"NOT CALIBRATED: {why}. The paper's choice is used; whether it keeps the right tokens of this model was not "
        f"checked. {advice}"
    )


class Notes:
    """Messages for the user, shown at once and kept for the report."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        """Add a remark."""
        self.texts.append(text)
        self.progress.note(text)

    def warn(self, text: str) -> None:
        """Add a warning."""
        self.texts.append(text)
        self.progress.warn(text)
