-- Takes the lines of a batch off the end of KEYS and ARGV, where every script that is put behind has them:
--
-- KEYS    at the end, if any task has a line: the index of the lines; then each line
-- ARGV    at the end: life of a record in ms; for each task the number of its line, separated by spaces, 0 for none;
--         the client of each line, separated by line breaks

local line_clients, line_numbers, line_keys = {}, {}, {}
for client in string.gmatch(table.remove(ARGV), '[^\n]+') do line_clients[#line_clients + 1] = client end
for number in string.gmatch(table.remove(ARGV), '%d+') do line_numbers[#line_numbers + 1] = tonumber(number) end
local line_life = table.remove(ARGV)
for i = #line_clients, 1, -1 do line_keys[i] = table.remove(KEYS) end
local line_index = #line_clients > 0 and table.remove(KEYS)

local line_elements, line_ends = {}, {}

-- Returns whether a task of this batch waits in its line.
local function waits_in_line(i) return (line_numbers[i] or 0) > 0 end

-- Adds an element to the line of a task.
local function add_to_line(i, element)
  local elements = line_elements[line_numbers[i]] or {}
  line_elements[line_numbers[i]] = elements
  elements[#elements + 1] = element
end

-- Writes the elements that were added. Returns a length for each line, 0 if none was added.
local function push_lines()
  local lengths = {}
  for i, client in ipairs(line_clients) do
    local elements = line_elements[i]
    lengths[i] = elements and push(line_index, line_keys[i], client, elements) or 0
  end
  return lengths
end

-- Counts that a task left the stream.
local function left_stream(i)
  local number = line_numbers[i] or 0
  if number > 0 then line_ends[number] = (line_ends[number] or 0) + 1 end
end

-- Moves as many tasks of each line as left the stream. Returns for each line its client, and what `move` returns.
local function move_next(stream)
  local rows = {}
  for i, client in ipairs(line_clients) do
    rows[i] = {client, move(stream, line_index, line_keys[i], client, line_ends[i] or 0, line_life)}
  end
  return rows
end
