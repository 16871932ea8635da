// Rows of results and the files that they are written to.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace nsa::bench {

using Value = std::variant<int64_t, double, std::string>;

/// Named values in the order in which they were set.
class Row {
 public:
  Row& set(const std::string& name, Value value);
  /// Null where there is none.
  const Value* find(const std::string& name) const;
  double number(const std::string& name) const;
  const std::vector<std::pair<std::string, Value>>& fields() const { return fields_; }

 private:
  std::vector<std::pair<std::string, Value>> fields_;
};

/// Of repeated launches, in milliseconds.
struct Spread {
  double median, q1, q3, least, most;
  int64_t repeats;
};
/// `times` must not be empty. Quartiles are interpolated.
Spread spread_of(std::vector<double> times);
void set_spread(Row& row, const Spread& spread);

struct Results {
  Row environment;
  std::vector<Row> rows;
};

/// {"environment": {...}, "rows": [...]}, a row a line; NaN and infinities become null.
std::string to_json(const Results& results);
/// A header of all columns in order of first appearance; a row without a value has an empty cell.
std::string to_csv(const std::vector<Row>& rows);

}  // namespace nsa::bench
