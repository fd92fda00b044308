-- Functions for the clients of a task; put before the scripts that use them.
--
-- The clients are one text: the epoch of the task, then names, each behind a space. A list of another epoch counts for
-- nothing. Until a second client joins there is none, and the first clients are those of the submit.
--
-- NAME   a client
-- +NAME  its webhooks: they keep the task when their client has left it, until it cancels once more
-- ?      the client that submitted the task, if that is unknown
-- -NAME  a client that left, next to an unknown one, so that it is not taken for that
-- *      the clients beyond the most that are counted; it never leaves

local UNCOUNTED = ' *'

-- Returns the names of a task's clients, each behind a space.
local function joined_clients(key, epoch, first_clients)
  local list = redis.pcall('GET', key)
  local their_epoch, names = string.match(type(list) == 'string' and list or '', '^(%d+)(.*)$')
  if their_epoch == epoch then return names end
  return ' ' .. first_clients
end

-- Returns where a name begins and ends in names, nil if it is none of them.
local function find_client(names, name)
  local first = string.find(names .. ' ', ' ' .. name .. ' ', 1, true)
  if first then return first, first + #name end
end

-- Returns the name under which a client cancels: its own, or that of its webhooks if it has left, or the unknown one.
local function name_of_cancel(names, client)
  for _, name in ipairs({client, '+' .. client}) do
    if find_client(names, name) then return name end
  end
  return find_client(names, '?') and not find_client(names, '-' .. client) and '?'
end

-- Returns the names after the cancel of a client, and whether the task goes on for others than its own webhooks.
local function names_after_cancel(names, client)
  local name = name_of_cancel(names, client)
  if not name then return names, true end
  local first, last = find_client(names, name)
  local others, has_clients = string.sub(names, 1, first - 1) .. string.sub(names, last + 1), false
  for other in string.gmatch(others, '%S+') do
    has_clients = has_clients or (other ~= '+' .. client and string.sub(other, 1, 1) ~= '-')
  end
  local mark = '-' .. client
  if name == client and find_client(others, '?') and not find_client(others, mark) then others = others .. ' ' .. mark end
  return others, has_clients
end
