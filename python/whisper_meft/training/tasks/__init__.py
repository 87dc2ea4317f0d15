"""What differs between the tasks that a run can train for."""
