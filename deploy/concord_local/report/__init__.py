"""The report of a run: plots/*.png and one report.html, made from nothing but the files of the run's
directory.

    reading  the files as one value             words   what things are called, in English and Chinese
    figures  numbers as people read them        charts  geometry of the drawings inside the page
    plots    the same drawings as PNG files     page    everything together, by report.html.j2
"""

from pathlib import Path

from concord_local.report.reading import read_run

__all__ = ["write_report"]


def write_report(directory: Path) -> None:
    """Writes `plots/*.png` and a self-contained `report.html` into the directory of a finished run.

    Raises:
        ArtefactError: a file of the run is missing or cannot be read, or a file cannot be written.
    """
    from concord_local.report.page import render
    from concord_local.report.plots import draw_all
    from concord_local.report.statistics import render_statistics
    from concord_local.rundir import RunDirectory
    from concord_server.checkpoints import RunStore
    from concord_shared.files import write_atomically

    if (directory / "statistics.json").exists():
        read, told = RunDirectory.open(directory), RunStore(directory)
        page = render_statistics(read.read_json("plan.json"), read.read_json("summary.json"), list(told.records()))
        write_atomically(directory / "report.html", page)
        return
    run = read_run(directory)
    plots = draw_all(run)
    (directory / "plots").mkdir(exist_ok=True)
    for name, png in plots.items():
        write_atomically(directory / "plots" / f"{name}.png", png)
    write_atomically(directory / "report.html", render(run, plots))
