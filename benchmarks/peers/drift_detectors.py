"""river and Evidently on the streams of `benchmarks.drift`, in their own environment."""

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.worker import serve


def look(
    how: str,
    known: Sequence[float],
    stream: Sequence[float],
    window: int,
    reference: Sequence[str] = (),
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    """Numbers of the requests at which there was an alarm, windows looked at, and seconds."""
    begun = time.perf_counter()
    alarms = evidently(reference, texts, window) if how == "evidently" else river(how, known, stream)
    return {"alarms": alarms, "windows": len(stream) // window, "seconds": time.perf_counter() - begun}


def river(how: str, known: Sequence[float], stream: Sequence[float]) -> list[int]:
    """Default settings; the detector has seen the reference first."""
    from river import drift  # pyright: ignore[reportMissingImports]

    detector: Any = {"adwin": drift.ADWIN, "kswin": drift.KSWIN, "page_hinkley": drift.PageHinkley}[how]()
    for value in known:
        detector.update(value)
    alarms = []
    for number, value in enumerate(stream, 1):
        detector.update(value)
        if detector.drift_detected:
            alarms.append(number)
    return alarms


def evidently(reference: Sequence[str], texts: Sequence[str], window: int) -> list[int]:
    """Evidently's drift of a text column (domain classifier), window after window."""
    import pandas
    from evidently import DataDefinition, Dataset, Report  # pyright: ignore[reportMissingImports]
    from evidently.metrics import DriftedColumnsCount  # pyright: ignore[reportMissingImports]

    definition = DataDefinition(text_columns=["text"])

    def data(rows: Sequence[str]) -> Any:
        return Dataset.from_pandas(pandas.DataFrame({"text": list(rows)}), data_definition=definition)

    before = data(reference)
    alarms = []
    for end in range(window, len(texts) + 1, window):
        report = Report([DriftedColumnsCount(columns=["text"])])
        found = report.run(data(texts[end - window : end]), before).dict()
        if found["metrics"][0]["value"]["count"]:
            alarms.append(end)
    return alarms


if __name__ == "__main__":
    serve({"look": look})
