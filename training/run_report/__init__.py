"""A run, or several, as one HTML page that needs nothing beside itself. Reads run folders; trains nothing.

`history`, `times` and `intake` say what a run's files hold, `examples` what its model finds; `markup`, `sections`,
`settings`, `curves`, `gallery` and `page` make HTML of it.
"""

from training.run_report.page import write_report

__all__ = ["write_report"]
