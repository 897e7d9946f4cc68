"""The parts of `kvjax leaderboard`."""
