"""What is measured of a contender, how it is verified and timed, and in which order."""
