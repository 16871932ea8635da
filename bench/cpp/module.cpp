// The Python module nsa_bench: the same benchmarks, arguments and rows as the program.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>

#include "run.h"

namespace py = pybind11;

namespace {

py::dict to_dict(const nsa::bench::Row& row) {
  py::dict dict;
  for (const auto& [name, value] : row.fields()) {
    const auto* real = std::get_if<double>(&value);
    dict[py::str(name)] = real && !std::isfinite(*real) ? py::object(py::none()) : py::cast(value);
  }
  return dict;
}

py::dict run(const std::vector<std::string>& arguments, const py::object& progress) {
  const nsa::bench::Options options = nsa::bench::parse_options(arguments);
  std::string command = "nsa_bench";
  for (const std::string& argument : arguments) command += " " + argument;
  const auto results = nsa::bench::run(options, command, [&](const nsa::bench::Row& row) {
    if (!progress.is_none()) progress(to_dict(row));
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  });
  py::list rows;
  for (const auto& row : results.rows) rows.append(to_dict(row));
  py::dict answer;
  answer["environment"] = to_dict(results.environment);
  answer["rows"] = rows;
  return answer;
}

}  // namespace

PYBIND11_MODULE(nsa_bench, m) {
  m.doc() = "Microbenchmarks of the CUDA kernels of nsa_ext.";
  py::register_exception<nsa::bench::UsageError>(m, "UsageError", PyExc_ValueError);
  m.def(
      "kernels",
      [] {
        py::dict kernels;
        for (const auto& kernel : nsa::bench::kernel_list())
          kernels[py::str(kernel.name)] = kernel.what;
        return kernels;
      },
      "The benchmarks: name -> what it times.");
  m.def("usage", &nsa::bench::usage, "The text of nsa_bench --help.");
  m.def("run", &run, py::arg("arguments"), py::arg("progress") = py::none(),
        "Runs the benchmarks that a command line asks for.\n\n"
        "Args:\n"
        "    arguments: as of the program, for instance [\"selected\", \"--lengths\", "
        "\"4096,64k\"];\n"
        "        --csv and --json write nothing here.\n"
        "    progress: called with each row, a dict, when it is complete.\n\n"
        "Returns:\n"
        "    {\"environment\": dict, \"rows\": list of dicts}.\n\n"
        "Raises:\n"
        "    UsageError, a ValueError: the arguments do not fit.\n"
        "    RuntimeError: an error of CUDA.");
}
