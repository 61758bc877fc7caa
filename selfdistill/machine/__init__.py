"""What this machine is and what it can take: hardware, packages, memory."""
