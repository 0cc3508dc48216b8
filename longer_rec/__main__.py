"""``python -m longer_rec``: the same as the ``longer-rec`` command, in the form that torchrun starts."""

from longer_rec.cli import main

if __name__ == "__main__":
    main()
