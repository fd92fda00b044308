-- Lists what waits in lines, as many lines as fit into one reply, and takes the empty ones out of the index.
--
-- KEYS    1 index of the lines; then each line
-- ARGV    1 maximum of listed tasks of a line; 2 bytes after which no more is read; then the client of each line
-- result  number of commands; then for each line that was read, at least the first: its length; the ids of its first
--         tasks
local index, most, bytes, commands, results, PAGE = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), 0, {}, 16

-- Returns the ids of the first tasks of a line, and whether these are all of them.
local function first_tasks(line)
  local ids = {}
  while #ids < most and bytes > 0 do
    local elements = run_on('LRANGE', line, #ids, #ids + PAGE - 1)
    commands = commands + 1
    for _, element in ipairs(elements) do
      bytes = bytes - #element
      ids[#ids + 1] = string.match(element, '^%d+ %d+ %x+ (%x+)\n') or ''
    end
    if #elements < PAGE then return ids, true end
  end
  return ids, false
end

for i = 2, #KEYS do
  local ids, is_whole = first_tasks(KEYS[i])
  local length = #ids
  if not is_whole then
    length, commands = redis.call('LLEN', KEYS[i]), commands + 1
  elseif length == 0 then
    redis.call('SREM', index, ARGV[i + 1])
    commands = commands + 1
  end
  results[#results + 1] = {length, ids}
  if bytes <= 0 then break end
end
return {commands, results}
