"""``efl run leader.py follower.py``: both parties on this machine, from one terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from efl._ports import free_port
from efl.cli._launcher import Launcher, Program
from efl.errors import ConfigError
from efl.settings import ROLES, command_line_settings

_SCRIPT = click.Path(exists=True, dir_okay=False, path_type=Path)


class _RunCommand(click.Command):
    """Keeps what follows ``--`` for the scripts, where click would mix it with the scripts' own names."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            split = args.index("--")
            args, ctx.meta[__name__] = args[:split], args[split + 1 :]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- ARGUMENTS...]"]


class _RoleScript(click.ParamType):
    name = "role=script"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        role, equals, script = str(value).partition("=")
        if not equals or role not in ROLES:
            self.fail(f"{value!r}: expected ROLE=SCRIPT with a role of {', '.join(ROLES)}", param, ctx)
        return role, Path(_SCRIPT.convert(script, param, ctx))


@click.command(cls=_RunCommand)
@click.argument("scripts", nargs=-1, type=_SCRIPT)
@click.option("--role", "roles", multiple=True, type=_RoleScript(), help="Say which script plays which role.")
@click.option(
    "--cwd",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path("."),
    help="Folder in which both scripts run. Default: this one.",
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Seconds that a party has to end by itself after the other has failed (2 at most if they had not met).",
)
@click.option("--verbose", is_flag=True, help="Show every line of the parties, TensorFlow's notes too.")
@click.pass_context
def run(
    ctx: click.Context,
    scripts: Sequence[Path],
    roles: Sequence[tuple[str, Path]],
    cwd: Path,
    grace: float,
    verbose: bool,
) -> None:
    """Run both parties of a federation on this machine.

    SCRIPTS are two Python files. A file whose name contains "leader" or "follower" plays that role; otherwise the
    first is the leader. Each is run as

        python SCRIPT --federal_role=ROLE --local_addr=... (or --peer_addr=...) ARGUMENTS

    on a free port of this machine, unless the arguments name addresses. Both logs appear here, each line after the
    name of its party, without TensorFlow's notes on the machine and on its version 1 API. Ctrl-C ends both. The exit
    code is the worse one of the two.
    """
    arguments: list[str] = ctx.meta.get(__name__, [])
    try:
        by_role = assign_roles(scripts, roles)
        addresses = choose_addresses(arguments, os.environ)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    programs = [
        Program(role, [sys.executable, str(script.resolve()), f"--federal_role={role}", *addresses[role], *arguments])
        for role, script in by_role.items()
    ]
    ctx.exit(Launcher(programs, cwd=cwd, grace=grace, verbose=verbose).run())


def assign_roles(scripts: Sequence[Path], roles: Sequence[tuple[str, Path]] = ()) -> dict[str, Path]:
    """Decides which script plays which role.

    Args:
      scripts: Scripts whose role follows from their names or, failing that, their order.
      roles: Explicit (role, script) pairs.

    Returns:
      Role to script, the leader first.

    Raises:
      ConfigError: There are not exactly one leader and one follower.
    """
    if roles and scripts:
        raise ConfigError("give the scripts either by --role or by position, not both")
    if not roles and len(scripts) != 2:
        raise ConfigError(
            f"expected two scripts, the leader's and the follower's, got {len(scripts)} "
            "(a script that can play both roles is given twice)"
        )
    if not roles:
        named = [[role for role in ROLES if role in script.name.lower()] for script in scripts]
        claims = [names[0] if len(names) == 1 else None for names in named]
        if claims[0] is None and claims[1] is None:
            claims = list(ROLES)
        other = dict(zip(ROLES, reversed(ROLES)))
        first = claims[0] or other[claims[1] or ""]
        roles = [(first, scripts[0]), (claims[1] or other[first], scripts[1])]
    names = [role for role, _ in roles]
    if sorted(names) != sorted(ROLES):
        raise ConfigError(
            f"expected one leader and one follower, got {' and '.join(names)}; "
            "say --role leader=SCRIPT --role follower=SCRIPT"
        )
    given = dict(roles)
    return {role: given[role] for role in ROLES}


def choose_addresses(arguments: Sequence[str], environ: Mapping[str, str]) -> dict[str, list[str]]:
    """Decides where the leader listens and the follower dials.

    Args:
      arguments: Command line that both scripts get.
      environ: Environment that both scripts get.

    Returns:
      Role to the flags that its script needs in addition. Where neither the arguments nor the environment name an
      address, both flags name the same free port of this machine; where they name one, the other side is pointed at
      it.

    Raises:
      ConfigError: The arguments name a role, or lack a value.
    """
    given = {name: value for name, value, _ in command_line_settings(arguments)}
    if "federal_role" in given:
        raise ConfigError("--federal_role is efl run's to give: each script gets its own")
    local = given.get("local_addr") or environ.get("EFL_LOCAL_ADDR")
    peer = given.get("peer_addr") or environ.get("EFL_PEER_ADDR")
    if not local and not peer:
        local = peer = f"localhost:{free_port()}"
        return {"leader": [f"--local_addr={local}"], "follower": [f"--peer_addr={peer}"]}
    if not peer:
        host, _, port = str(local).rpartition(":")
        reachable = "localhost" if host in ("0.0.0.0", "[::]") else host
        return {"leader": [], "follower": [f"--peer_addr={reachable}:{port}"]}
    if not local:
        return {"leader": [f"--local_addr={peer}"], "follower": []}
    return {"leader": [], "follower": []}
