"""Ray: sessions, workers, searches, jobs, and the run store."""


class JobFailed(RuntimeError):
    """A job on a cluster, or one of several stages at once, did not end well; the message says how to go on."""
