"""The project's version, which files tell that it wrote."""

VERSION = "0.1.0"
