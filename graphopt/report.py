from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    log: object

    @staticmethod
    def of(name, settings, log):
        return Report(log)
