"""Runs the service with as few descriptors as `NOFILE` says, soft and hard."""

import os
import resource

from imagegen.app import main

if __name__ == "__main__":
    count = int(os.environ["NOFILE"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
    main()
