"""Service with `NOFILE` as its soft and hard limit of descriptors."""

import os
import resource

from imagegen.process import main

if __name__ == "__main__":
    count = int(os.environ["NOFILE"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
    main()
