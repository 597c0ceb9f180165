"""From one way of accumulating to another in mid-window: `convert`."""
