"""Floor 6: a run, or many, as one page that needs nothing outside itself. May import everything below; never scaling
or serve.

`read` gathers what a workdir holds, `curves` draws it, `page` is the HTML around it; `run_page` and `runs_page` say
what is shown. Drawing is plain SVG, styled by the page, so it follows the reader's light or dark theme.
"""

from llmlab.report.run_page import write_report
from llmlab.report.runs_page import write_runs_report

__all__ = ["write_report", "write_runs_report"]
