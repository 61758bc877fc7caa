"""A program for two processes, whose main one takes longer at the end than a collective operation waits."""

import time

from selfdistill.runs.processes import Processes


def main() -> None:
    with Processes(cpu=True, timeout_s=2) as processes:
        time.sleep(4 if processes.is_main else 0)
        processes.wait_for_all()
        print("over", flush=True)


if __name__ == "__main__":
    main()
