"""Print what pyproject.toml requires for an accelerator and a list of extras, for an image without the project itself.

For example:
    python infra/requirements.py pyproject.toml cuda gcs,s3
"""

import sys
import tomllib

ACCELERATORS = ("cpu", "cuda", "tpu")


def main() -> None:
    path, accelerator, extras = sys.argv[1:]
    if accelerator not in ACCELERATORS:
        sys.exit(f"ACCELERATOR={accelerator}: give one of {', '.join(ACCELERATORS)}")
    with open(path, "rb") as file:
        project = tomllib.load(file)["project"]
    optional = {"cpu": [], **project["optional-dependencies"]}
    wanted = [accelerator, *filter(None, extras.split(","))]
    if unknown := [name for name in wanted if name not in optional]:
        sys.exit(f"EXTRAS={extras}: no {unknown[0]}; give any of {', '.join(project['optional-dependencies'])}")
    print(*project["dependencies"], *(line for name in wanted for line in optional[name]), sep="\n")


if __name__ == "__main__":
    main()
