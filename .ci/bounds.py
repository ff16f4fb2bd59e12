"""Prints constraints for pip: `oldest` pins the requirements of the package to their lower bounds.

`newest` prints none. Extras are not pinned: they are for tests and for single features.
"""

import configparser
import re
import sys
from pathlib import Path

if __name__ == "__main__" and sys.argv[1] == "oldest":
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg")
    for line in config["options"]["install_requires"].split("\n"):
        if found := re.fullmatch(r"([\w.-]+)>=([\w.]+)", line.strip()):
            print(f"{found[1]}=={found[2]}")
