"""`python -m varpi`, and with it `torchrun -m varpi train …`."""

from varpi.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
