"""The report page: gathers what a run has left, judges it, and draws it."""
