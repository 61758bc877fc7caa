"""What a model can do, and alarms about what it is becoming."""
