"""What a study refuses."""


class StudyError(Exception):
    """Something that would make results worthless, or without which there are none."""
