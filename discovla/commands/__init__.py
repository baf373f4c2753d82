"""The subcommands of `discovla`, one a file: `add(commands)` declares it."""
