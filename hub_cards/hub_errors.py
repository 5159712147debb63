"""What goes wrong between here and the Hub, in one sentence each."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)

from esmerge.errors import InputError, first_line
from esmerge.hub import transport_error

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token with write permission"
GO_ON = "the same command goes on, and what has arrived is not sent again"


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Let everything that the Hub or the connection refuses be an `InputError` that says what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise InputError("HF_HUB_OFFLINE is set, so nothing can be published: unset it, and run this again.") from error
    except LocalTokenNotFoundError as error:
        raise InputError(f"nobody is logged in to the Hub: {LOG_IN}.") from error
    except LocalEntryNotFoundError as error:  # neither there nor in the cache
        raise InputError(f"{first_line(error)}; {GO_ON}.") from error
    except RevisionNotFoundError as error:
        raise InputError(f"{repo_id} has no such branch or pull request: check --revision.") from error
    except (HfHubHTTPError, transport_error(), ConnectionError, TimeoutError, RuntimeError) as error:
        # Uploads raise a RuntimeError from what went wrong.
        reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ is not None else error
        if isinstance(reason, HfHubHTTPError):
            raise InputError(_sentence(repo_id, reason)) from error
        if not isinstance(reason, (transport_error(), ConnectionError, TimeoutError)):
            raise
        raise InputError(
            f"the connection to the Hub failed ({first_line(reason)}) before all was done; {GO_ON}."
        ) from error


def _sentence(repo_id: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else 0
    reason = first_line(getattr(error, "server_message", None) or error)
    if status == 401:
        return f"the Hub does not accept the token ({reason}): {LOG_IN}."
    if status == 403:
        return (
            f"the token may not write to {repo_id} ({reason}): take one with write permission for it "
            "(https://huggingface.co/settings/tokens), another name, or --pr for a pull request."
        )
    if status == 404:
        return f"the Hub does not show {repo_id} to you ({reason}): check the name, and that your token may see it."
    if status == 412:
        return (
            f"somebody else changed {repo_id} while this was being published, so nothing of it was: look at what they "
            "did, and run the same command again (or with --pr) to publish on top of it."
        )
    if status == 429:
        return f"the Hub asks for fewer requests ({reason}) before all was done: wait some minutes; {GO_ON}."
    if status >= 500:
        return f"the Hub has a problem ({status}: {reason}) before all was done; {GO_ON}."
    return f"the Hub refuses this for {repo_id} ({status}: {reason})."
