"""The search for the schedule that meets a target."""
