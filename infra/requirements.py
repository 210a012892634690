"""Print what pyproject.toml requires to train and to measure on an accelerator, with other extras, for an image without
the project itself.

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
    wanted = ["train", "eval", accelerator, *filter(None, extras.split(","))]
    if unknown := [name for name in wanted if name not in optional]:
        sys.exit(f"EXTRAS={extras}: no {unknown[0]}; give any of {', '.join(project['optional-dependencies'])}")
    extra = (line for name in wanted for line in optional[name] if not line.startswith(f"{project['name']}["))
    print(*project["dependencies"], *extra, sep="\n")


if __name__ == "__main__":
    main()
