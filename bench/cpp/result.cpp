#include "result.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>

namespace nsa::bench {

namespace {

std::string number_text(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}

std::string json_text(const std::string& value) {
  std::string text = "\"";
  for (const char c : value) {
    if (c == '"' || c == '\\') {
      text += '\\';
      text += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", c);
      text += code;
    } else {
      text += c;
    }
  }
  return text + "\"";
}

std::string json_text(const Value& value) {
  if (const auto* integer = std::get_if<int64_t>(&value)) return std::to_string(*integer);
  if (const auto* real = std::get_if<double>(&value))
    return std::isfinite(*real) ? number_text(*real) : "null";
  return json_text(std::get<std::string>(value));
}

std::string json_text(const Row& row) {
  std::string text;
  for (const auto& [name, value] : row.fields())
    text += (text.empty() ? "{" : ", ") + json_text(name) + ": " + json_text(value);
  return text.empty() ? "{}" : text + "}";
}

std::string csv_text(const Value& value) {
  if (const auto* integer = std::get_if<int64_t>(&value)) return std::to_string(*integer);
  if (const auto* real = std::get_if<double>(&value))
    return std::isfinite(*real) ? number_text(*real) : "";
  const std::string& plain = std::get<std::string>(value);
  if (plain.find_first_of(",\"\n") == std::string::npos) return plain;
  std::string quoted = "\"";
  for (const char c : plain) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

}  // namespace

Row& Row::set(const std::string& name, Value value) {
  for (auto& field : fields_)
    if (field.first == name) {
      field.second = std::move(value);
      return *this;
    }
  fields_.emplace_back(name, std::move(value));
  return *this;
}

const Value* Row::find(const std::string& name) const {
  for (const auto& field : fields_)
    if (field.first == name) return &field.second;
  return nullptr;
}

double Row::number(const std::string& name) const {
  const Value* value = find(name);
  if (value == nullptr) return std::nan("");
  if (const auto* integer = std::get_if<int64_t>(value)) return static_cast<double>(*integer);
  if (const auto* real = std::get_if<double>(value)) return *real;
  return std::nan("");
}

Spread spread_of(std::vector<double> times) {
  if (times.empty()) throw std::logic_error("no times");
  std::sort(times.begin(), times.end());
  const auto quantile = [&](double q) {
    const double position = q * (times.size() - 1);
    const auto below = static_cast<size_t>(position);
    const double above = times[std::min(below + 1, times.size() - 1)];
    return times[below] + (position - below) * (above - times[below]);
  };
  return {quantile(0.5), quantile(0.25), quantile(0.75),
          times.front(), times.back(),   static_cast<int64_t>(times.size())};
}

void set_spread(Row& row, const Spread& spread) {
  row.set("median_ms", spread.median).set("q1_ms", spread.q1).set("q3_ms", spread.q3);
  row.set("min_ms", spread.least).set("max_ms", spread.most).set("repeats", spread.repeats);
}

std::string to_json(const Results& results) {
  std::string text = "{\n  \"environment\": " + json_text(results.environment) + ",\n  \"rows\": [";
  for (size_t i = 0; i < results.rows.size(); ++i)
    text += (i == 0 ? "\n    " : ",\n    ") + json_text(results.rows[i]);
  return text + "\n  ]\n}\n";
}

std::string to_csv(const std::vector<Row>& rows) {
  std::vector<std::string> columns;
  for (const Row& row : rows)
    for (const auto& field : row.fields())
      if (std::find(columns.begin(), columns.end(), field.first) == columns.end())
        columns.push_back(field.first);
  std::string text;
  for (const std::string& column : columns)
    text += (text.empty() ? "" : ",") + csv_text(Value(column));
  text += "\n";
  for (const Row& row : rows) {
    for (size_t i = 0; i < columns.size(); ++i) {
      const Value* value = row.find(columns[i]);
      text += (i == 0 ? "" : ",") + (value ? csv_text(*value) : "");
    }
    text += "\n";
  }
  return text;
}

}  // namespace nsa::bench
