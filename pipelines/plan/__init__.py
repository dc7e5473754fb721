"""What a run will need on N workers, before anything is paid for."""
