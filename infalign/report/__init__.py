"""Report: what a run left on disk, as tables, plots and one self-contained page. Loads no torch."""
