class WrappersMP:
    OUTER_SAMPLE: str
    APPLY_MODEL: str
    PREPARE_SAMPLING: str
    CALC_COND_BATCH: str
