// The penalties by name, for code that handles rows of statistics without knowing of which penalty.
#pragma once

#include <string>

#include "../penalties.h"
#include "kernels.h"

namespace r2 {

// A row is `row_size` doubles; `parameter` is M or the temperature, 0 where there is none.
struct PenaltyEntry {
  const char* name;
  int64_t row_size;
  bool has_parameter, is_sparse, is_one_pass;
  void (*set_empty)(double* row);
  void (*merge)(double* row, const double* other, double parameter);
  Value (*finalize)(const double* row, double parameter);
};

template <class Penalty>
struct RowFunctions {
  using Row = typename Penalty::Row;

  static void set_empty(double* row) { save(Row::empty(), row); }
  static void merge(double* row, const double* other, double parameter) {
    Row merged = load(row);
    merged.merge(load(other), parameter);
    save(merged, row);
  }
  static Value finalize(const double* row, double parameter) { return load(row).finalize(parameter); }

  static Row load(const double* from) {
    Row row;
    __builtin_memcpy(&row, from, sizeof(row));
    return row;
  }
  static void save(const Row& row, double* to) { __builtin_memcpy(to, &row, sizeof(row)); }

  static constexpr PenaltyEntry entry() {
    return {Penalty::kName,
            sizeof(Row) / sizeof(double),
            Penalty::kHasParameter,
            Penalty::kIsSparse,
            Penalty::kIsOnePass,
            set_empty,
            merge,
            finalize};
  }
};

template <class List>
struct EntriesOf;
template <class... Of>
struct EntriesOf<PenaltyList<Of...>> {
  static constexpr PenaltyEntry kAll[] = {RowFunctions<Of>::entry()...};
};
inline constexpr const PenaltyEntry (&kPenalties)[kPenaltyCount] = EntriesOf<Penalties>::kAll;

}  // namespace r2
