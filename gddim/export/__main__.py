import sys

from gddim.export.command import main

if __name__ == "__main__":
    sys.exit(main())
