"""`python -m training.main`: train a CLIP model. Exit codes: 0 done, 75 preempted and saved, 2 configuration, 1 else.

Mistakes on the command line answer before torch is imported; what follows is told in `training.run`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from training.cli import parse_args
from training.config import shared_settings
from training.errors import EXIT_FAILED, PeerError, StoppedEarly, UserError, describe_os_error
from training.leave import leave
from training.preemption import Preemption, hold_signals, release_signals

log = logging.getLogger("training.main")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, join the other ranks, train, leave. Returns the exit code."""
    try:
        config = parse_args(argv)
        if config.run.dry_run:
            from training.dry_run import dry_run

            release_signals()
            return dry_run(config)
        # A signal may come at any time: while torch is imported and while ranks gather, too.
        with Preemption(margin_s=config.run.preempt_margin_s) as preemption:
            # Heavy imports wait until the command line is known to be right.
            from training.distributed import session
            from training.run import train

            with session(config.cluster, shared_settings(config)) as world:
                return train(config, world, preemption)
    except UserError as error:
        log.error("error: %s", error)
        return error.exit_code
    except StoppedEarly as stop:
        return stop.exit_code
    except PeerError as error:
        # The rank that met the error has said so itself.
        log.debug("%s", error)
        return error.exit_code
    except OSError as error:
        # A full disk or a vanished folder; train.log has where it happened.
        log.error("error: %s", describe_os_error(error))
        return EXIT_FAILED
    except Exception as error:
        log.exception("error: %s: not a mistake of yours, please report it", type(error).__name__)
        return getattr(error, "exit_code", EXIT_FAILED)


if __name__ == "__main__":
    hold_signals()
    leave(main())
